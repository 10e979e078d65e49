"""The loops of a node, and the one place where everything is wired."""
