"""What a run says, on its way from the trainer's pipes into files, and back out of them."""
