"""The paper in pure torch: baselines, advantages, normalisation and the blockwise loss.

This room imports only `bae.text`, and neither Lightning nor Hydra nor transformers. Start with baselines.py and
losses.py; stated_numbers.py has what the policy's own distribution over a stated number promises.
"""
