"""The embedded default: drawn pictures and small networks trained on them, so that everything runs without network."""
