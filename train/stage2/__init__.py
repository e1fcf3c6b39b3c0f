"""Stage 2, the audio-infused recogniser; it reads feature stores and tables, never a video."""
