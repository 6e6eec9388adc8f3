"""The training run: trainer, phases, schedule, stopping and telemetry."""
