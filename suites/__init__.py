"""Plugins that come with the harness; nothing in `bench` imports them."""
