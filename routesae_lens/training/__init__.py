"""Training through SAELens' runner: entry point, data, schedules, checkpoints that resume exactly."""
