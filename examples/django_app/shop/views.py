"""Ask, and read what became of it."""

from __future__ import annotations

from celery.result import AsyncResult
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_POST

from shop.celery import app, generate
from shop.models import Question


@require_GET
def questions(request: HttpRequest) -> HttpResponse:
    latest = Question.objects.order_by("-asked_at")[:20]
    return render(request, "questions.html", {"questions": latest})


@require_POST
def ask(request: HttpRequest) -> HttpResponse:
    prompt, adapter_id = request.POST["prompt"], request.POST.get("adapter_id") or None
    messages = [{"role": "user", "content": prompt}]
    job = generate.delay(messages=messages, adapter_id=adapter_id, tenant="shop")
    question = Question.objects.create(prompt=prompt, job_id=job.id)
    return redirect("question", question.pk)


@require_GET
def question(request: HttpRequest, pk: int) -> HttpResponse:
    """The page asks again by itself until there is an answer."""
    asked = get_object_or_404(Question, pk=pk)
    job = AsyncResult(asked.job_id, app=app)
    text = error = None
    if job.ready():  # asked once: it may end while this page is made
        text = job.result["text"] if job.successful() else None
        error = None if job.successful() else job.result
    return render(request, "question.html", {"question": asked, "text": text, "error": error})
