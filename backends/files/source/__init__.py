"""What a method of a class would do with its arguments, followed in its source. No torch."""
