"""The position in the training data, recorded at a save and restored at a resume."""
