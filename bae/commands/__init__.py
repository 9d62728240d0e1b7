"""The entry points bae-train, bae-evaluate, bae-fidelity, bae-report and bae-warmstart.

This room may import every other, and is the only one that sees Hydra and OmegaConf. Start with train.py; build.py makes
the parts that a configuration names, schema.py holds the types of its keys.
"""
