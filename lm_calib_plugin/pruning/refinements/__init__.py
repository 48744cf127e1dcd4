"""Better masks: one way of moving what is removed a file."""
