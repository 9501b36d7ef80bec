"""Options of the verbs except train, one file per verb: frozen dataclasses with the defaults."""
