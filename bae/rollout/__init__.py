"""Sample completions of problems and score them.

This room imports the rooms up to `bae.training`. Start with pipeline.py (encode, sample, score) and interface.py (what
an engine is); local/ samples in this process, vllm/ through vLLM.
"""
