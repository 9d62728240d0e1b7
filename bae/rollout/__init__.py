"""Sample completions of problems and score them.

This room imports the rooms up to `bae.training`. Start with pipeline.py, which encodes, samples and scores, and with
interface.py, which says what a rollout engine is. local/ samples in this process, vllm/ samples through vLLM.
"""
