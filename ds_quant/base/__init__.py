"""What every room uses: errors, messages, patterns of names, and files that are written whole or checked before use."""
