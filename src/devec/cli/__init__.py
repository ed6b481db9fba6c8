"""The ``devec`` command: parse, call the verb, print. ``--help`` imports neither torch nor rich."""
