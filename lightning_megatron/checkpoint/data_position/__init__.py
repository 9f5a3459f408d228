"""Where in its data a run is, recorded at a save and restored at a resume."""
