"""Images, videos and sounds to the tensors that the towers read (fact sheet, sections 3.1, 3.4 and 3.7)."""
