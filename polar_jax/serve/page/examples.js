export const EXAMPLES = [
  {
    name: 'A short sum',
    prompt: 'A baker sells 12 rolls at 40 cents each. How much does he take?',
    reference: '12 times 40 cents is 480 cents, so he takes 4.80 euros.',
    candidates: [
      '40 cents times 12 is 480 cents. That makes 4.80 euros.',
      'He takes 4.80 euros.',
      '12 + 40 = 52, so he takes 52 cents.',
      'Bakers get up early, and their rolls taste best while they are warm.',
    ],
  },
  {
    name: 'A tone of voice',
    prompt: 'My train is late again. Say something.',
    reference: 'Oh no, what a nuisance! I hope that you have at least a good book with you and a warm place to wait.',
    candidates: [
      'How annoying! Maybe there is a nice café at the station where you can wait out of the wind.',
      'Trains are late for many reasons, among them works on the line and broken signals.',
      'Then go by bike.',
      'Choo choo! The timetable is only a fairy tale that the railway tells its children.',
    ],
  },
  {
    name: 'A form to keep',
    prompt: 'List three animals that live in rivers.',
    reference: '- otter\n- pike\n- kingfisher',
    candidates: [
      '- beaver\n- trout\n- dipper',
      'Beavers, trout and dippers live in rivers.',
      '1. beaver\n2. trout\n3. dipper',
      '- lion\n- camel\n- eagle',
    ],
  },
];
