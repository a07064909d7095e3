"""The gateway, killed again and again under load: what it accepted must end all the same, once."""
