"""Sample with vLLM, in this process (engine.py) or on a server (server_engine.py).

This folder imports what `bae.rollout` may import, and vLLM itself only when an engine is made. Start with engine.py;
weights.py and transfer.py bring the policy's weights to vLLM.
"""
