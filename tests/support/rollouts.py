"""What tests of rollout engines ask for."""

from bae.rollout.interface import SamplingRequest

PROMPTS = ["1+2=", "37+48-5=", "9-9+9-9="]


def sample(engine, policy, group_size=4, limit=12, temperature=1.0, prompts=PROMPTS, keys=None, eos=None, **more):
    """Sample with an engine. eos: None for the tokenizer's. more: of SamplingRequest."""
    ids = [policy.encode("", question) for question in prompts]
    request = SamplingRequest(
        ids,
        keys or [(0, 0, i) for i in range(len(ids))],
        group_size=group_size,
        max_new_tokens=limit,
        temperature=temperature,
        eos_token_id=policy.tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=policy.tokenizer.pad_token_id,
        **more,
    )
    return engine.sample(policy.model, request)
