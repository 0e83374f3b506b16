"""Frameworks whose MoE layers can use our dispatcher; importing this package imports none of them."""
