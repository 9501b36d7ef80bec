"""What a run learns, one file a task: examples, loss and measurement; which parameters are trained."""
