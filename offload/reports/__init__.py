"""What a run did and what bound it: as JSON, as a page, as a trace."""
