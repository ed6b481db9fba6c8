"""The verbs, one file each: the only place where io, methods, engine, evaluate and report meet."""
