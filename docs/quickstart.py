import jax

import er_jax

sizes = dict(vocab_size=256, dim=128, num_layers=2, num_heads=4, num_kv_heads=2)
policy = er_jax.Decoder(er_jax.DecoderConfig(hidden_dim=384, **sizes))
params = policy.init(jax.random.key(0))  # or your own: any er_jax.Policy will do
prompts = [list(b"2 + 2 ="), list(b"Once upon a time")]
config = er_jax.RolloutConfig(max_new_tokens=64, n=4, stop_token_ids=(10,))
out = er_jax.rollout(policy, params, prompts, key=jax.random.key(1), config=config)
print(out.stats.summary())
print(bytes(out.completion_ids[0, : out.lengths[0]].tolist()), out.finish_reason[0])
