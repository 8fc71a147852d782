"""What a render leaves beside its picture until that is finished, so that nothing stops it for good."""
