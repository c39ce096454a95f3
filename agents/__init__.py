"""Who proposes and who reads."""
