"""The agent, and its use on new jobs."""
