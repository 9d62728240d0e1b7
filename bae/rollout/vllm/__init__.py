"""Sample with vLLM, in this process (engine.py) or on a server (server_engine.py).

Imports what `bae.rollout` may import, and vLLM only when an engine is made. Start with engine.py; weights.py says how
the policy's weights get there.
"""
