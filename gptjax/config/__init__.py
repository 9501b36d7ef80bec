"""Everything that a user can set: frozen dataclasses, the only place of defaults, and their strict reader."""
