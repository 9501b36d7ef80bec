"""Options of the verbs other than train, one file a verb, as frozen dataclasses: the only place of their defaults."""
