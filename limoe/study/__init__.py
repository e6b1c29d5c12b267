"""Studies: grids of trainings that compare settings, with means and intervals over seeds."""
