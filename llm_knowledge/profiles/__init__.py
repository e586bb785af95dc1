"""What prompts may know: events of the profile window by user, item and scenario."""
