"""What a researcher reads: interpretations by a judge and the page of a run."""
