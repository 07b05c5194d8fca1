"""What a run will need before it starts: parameters, memory, time, and the cluster it fits on. No Ray, no DeepSpeed."""
