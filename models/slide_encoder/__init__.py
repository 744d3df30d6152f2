"""All tile embeddings of a slide to one slide embedding: LongNet and its parts."""
