"""Model shapes: published models, and the miniatures.

The fields are those of each checkpoint's config.json. A shape serves every head: its language, reward and value models differ in
nothing but the head.
"""

from __future__ import annotations

# The shape of the InternLM2.5 language model that POLAR-1.8B starts from. The config.json of POLAR-1.8B itself was not available.
POLAR_1_8B = {
  'family': 'internlm2',
  'vocab_size': 92_544,
  'num_layers': 24,
  'd_model': 2_048,
  'd_ff': 8_192,
  'num_heads': 16,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'rope_scaling': 'dynamic',
  'rope_factor': 2.0,
  'max_position': 32_768,
  'norm_eps': 1e-5,
}

POLAR_7B = {
  'family': 'internlm2',
  'vocab_size': 92_544,
  'num_layers': 32,
  'd_model': 4_096,
  'd_ff': 14_336,
  'num_heads': 32,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 5e7,
  'rope_scaling': 'dynamic',
  'rope_factor': 2.0,
  'max_position': 262_144,
  'norm_eps': 1e-5,
}

# The published language model; the one that POLAR-7B starts from has different rotary embeddings.
INTERNLM2_5_7B = POLAR_7B | {'rope_theta': 1e6, 'max_position': 32_768}

INTERNLM3_8B = {
  'family': 'internlm3',
  'vocab_size': 128_512,
  'num_layers': 48,
  'd_model': 4_096,
  'd_ff': 10_240,
  'num_heads': 32,
  'num_kv_heads': 2,
  'head_dim': 128,
  'rope_theta': 5e7,
  'rope_scaling': 'dynamic',
  'rope_factor': 6.0,
  'max_position': 32_768,
  'norm_eps': 1e-5,
}

LLAMA_3_1_8B = {
  'family': 'llama',
  'vocab_size': 128_256,
  'num_layers': 32,
  'd_model': 4_096,
  'd_ff': 14_336,
  'num_heads': 32,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 5e5,
  'rope_scaling': 'llama3',
  'rope_factor': 8.0,
  'rope_low_freq_factor': 1.0,
  'rope_high_freq_factor': 4.0,
  'rope_original_length': 8_192,
  'max_position': 131_072,
  'norm_eps': 1e-5,
}

SMOLLM2_135M = {
  'family': 'llama',
  'vocab_size': 49_152,
  'num_layers': 30,
  'd_model': 576,
  'd_ff': 1_536,
  'num_heads': 9,
  'num_kv_heads': 3,
  'head_dim': 64,
  'rope_theta': 1e5,
  'max_position': 8_192,
  'norm_eps': 1e-5,
  'tie_embeddings': True,
}

# The base models.
QWEN2_5_7B = {
  'family': 'qwen2',
  'vocab_size': 152_064,
  'num_layers': 28,
  'd_model': 3_584,
  'd_ff': 18_944,
  'num_heads': 28,
  'num_kv_heads': 4,
  'head_dim': 128,
  'rope_theta': 1e6,
  'max_position': 131_072,
  'norm_eps': 1e-6,
  'qkv_bias': True,
}

QWEN2_5_32B = {
  'family': 'qwen2',
  'vocab_size': 152_064,
  'num_layers': 64,
  'd_model': 5_120,
  'd_ff': 27_648,
  'num_heads': 40,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'max_position': 131_072,
  'norm_eps': 1e-5,
  'qkv_bias': True,
}

# The instruct models that reinforcement fine-tuning starts from. (Those of InternLM3 and Llama 3.1 have the shapes above.)
QWEN2_5_7B_INSTRUCT = QWEN2_5_7B | {'max_position': 32_768}
QWEN2_5_32B_INSTRUCT = QWEN2_5_32B | {'max_position': 32_768, 'norm_eps': 1e-6}

# Qwen3, after its post-training; the base models have a max_position of 32,768.
QWEN3_0_6B = {
  'family': 'qwen3',
  'vocab_size': 151_936,
  'num_layers': 28,
  'd_model': 1_024,
  'd_ff': 3_072,
  'num_heads': 16,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'max_position': 40_960,
  'norm_eps': 1e-6,
  'qk_norm': True,
  'tie_embeddings': True,
}
QWEN3_1_7B = QWEN3_0_6B | {'d_model': 2_048, 'd_ff': 6_144}
QWEN3_4B = QWEN3_0_6B | {'num_layers': 36, 'd_model': 2_560, 'd_ff': 9_728, 'num_heads': 32}
QWEN3_8B = QWEN3_4B | {'d_model': 4_096, 'd_ff': 12_288, 'tie_embeddings': False}
QWEN3_14B = QWEN3_8B | {'num_layers': 40, 'd_model': 5_120, 'd_ff': 17_408, 'num_heads': 40}
QWEN3_32B = QWEN3_14B | {'num_layers': 64, 'd_ff': 25_600, 'num_heads': 64}

# The base models. Version 0.3 has no window, a larger base of its rotary embeddings, and 768 more tokens.
MISTRAL_7B_V0_1 = {
  'family': 'mistral',
  'vocab_size': 32_000,
  'num_layers': 32,
  'd_model': 4_096,
  'd_ff': 14_336,
  'num_heads': 32,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e4,
  'sliding_window': 4_096,
  'max_position': 32_768,
  'norm_eps': 1e-5,
}
MISTRAL_7B_V0_3 = MISTRAL_7B_V0_1 | {'vocab_size': 32_768, 'rope_theta': 1e6, 'sliding_window': None}

# The base models, of text alone. The vocabulary of the larger ones includes tokens of images.
GEMMA3_270M = {
  'family': 'gemma3_text',
  'vocab_size': 262_144,
  'num_layers': 18,
  'd_model': 640,
  'd_ff': 2_048,
  'num_heads': 4,
  'num_kv_heads': 1,
  'head_dim': 256,
  'rope_theta': 1e6,
  'rope_local_theta': 1e4,
  'sliding_window': 512,
  'global_every': 6,
  'max_position': 32_768,
  'norm_eps': 1e-6,
  'qk_norm': True,
  'post_norms': True,
  'zero_centered_norms': True,
  'embedding_scale': True,
  'activation': 'gelu_tanh',
  'tie_embeddings': True,
}
GEMMA3_1B = GEMMA3_270M | {'num_layers': 26, 'd_model': 1_152, 'd_ff': 6_912}
GEMMA3_4B = GEMMA3_270M | {
  'vocab_size': 262_208,
  'num_layers': 34,
  'd_model': 2_560,
  'd_ff': 10_240,
  'num_heads': 8,
  'num_kv_heads': 4,
  'rope_scaling': 'linear',
  'rope_factor': 8.0,
  'sliding_window': 1_024,
  'max_position': 131_072,
}
GEMMA3_12B = GEMMA3_4B | {'num_layers': 48, 'd_model': 3_840, 'd_ff': 15_360, 'num_heads': 16, 'num_kv_heads': 8}
GEMMA3_27B = GEMMA3_12B | {
  'num_layers': 62,
  'd_model': 5_376,
  'd_ff': 21_504,
  'num_heads': 32,
  'num_kv_heads': 16,
  'head_dim': 128,
  'query_pre_attn_scalar': 168.0,
}

SMOLLM3_3B = {
  'family': 'smollm3',
  'vocab_size': 128_256,
  'num_layers': 36,
  'd_model': 2_048,
  'd_ff': 11_008,
  'num_heads': 16,
  'num_kv_heads': 4,
  'head_dim': 128,
  'rope_theta': 5e6,
  'nope_every': 4,
  'max_position': 65_536,
  'norm_eps': 1e-6,
  'tie_embeddings': True,
}

# Small data sets limit these models before their size does. init_std is about 1 / sqrt(d_model); all layers are unrolled, which is
# faster on a CPU.
MINI_TINY = {
  'num_layers': 3,
  'd_model': 64,
  'd_ff': 192,
  'num_heads': 2,
  'num_kv_heads': 1,
  'head_dim': 32,
  'init_std': 0.12,
  'scan_unroll': 3,
}

MINI_SMALL = {
  'num_layers': 2,
  'd_model': 96,
  'd_ff': 288,
  'num_heads': 3,
  'num_kv_heads': 1,
  'head_dim': 32,
  'init_std': 0.1,
  'scan_unroll': 2,
}

PRESETS = {
  'polar_1_8b': POLAR_1_8B,
  'polar_7b': POLAR_7B,
  'internlm2_5_7b': INTERNLM2_5_7B,
  'internlm3_8b': INTERNLM3_8B,
  'llama_3_1_8b': LLAMA_3_1_8B,
  'smollm2_135m': SMOLLM2_135M,
  'qwen2_5_7b': QWEN2_5_7B,
  'qwen2_5_32b': QWEN2_5_32B,
  'qwen2_5_7b_instruct': QWEN2_5_7B_INSTRUCT,
  'qwen2_5_32b_instruct': QWEN2_5_32B_INSTRUCT,
  'qwen3_0_6b': QWEN3_0_6B,
  'qwen3_1_7b': QWEN3_1_7B,
  'qwen3_4b': QWEN3_4B,
  'qwen3_8b': QWEN3_8B,
  'qwen3_14b': QWEN3_14B,
  'qwen3_32b': QWEN3_32B,
  'mistral_7b_v0_1': MISTRAL_7B_V0_1,
  'mistral_7b_v0_3': MISTRAL_7B_V0_3,
  'gemma3_270m': GEMMA3_270M,
  'gemma3_1b': GEMMA3_1B,
  'gemma3_4b': GEMMA3_4B,
  'gemma3_12b': GEMMA3_12B,
  'gemma3_27b': GEMMA3_27B,
  'smollm3_3b': SMOLLM3_3B,
  'mini_tiny': MINI_TINY,
  'mini_small': MINI_SMALL,
}
