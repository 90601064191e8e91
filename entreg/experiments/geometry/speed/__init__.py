"""Speed of the exact geometry against its peers."""
