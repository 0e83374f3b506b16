"""Tests, mirroring moe_ep_plugin/."""
