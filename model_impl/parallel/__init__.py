"""One model over several processes: pipeline, tensor and expert parallel."""
