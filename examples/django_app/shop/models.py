from django.db import models


class Question(models.Model):
    """`job_id` is the Celery task's id and lorabatch's."""

    prompt = models.TextField()
    job_id = models.CharField(max_length=64)
    asked_at = models.DateTimeField(auto_now_add=True)
