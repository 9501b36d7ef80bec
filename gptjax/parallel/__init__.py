"""Where arrays live: the mesh, and one rule table from parameter path to sharding."""
