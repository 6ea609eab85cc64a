"""A decision and its history, in every form they are shown in."""
