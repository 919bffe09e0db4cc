"""What answers requests: the teacher service and the image endpoint."""
