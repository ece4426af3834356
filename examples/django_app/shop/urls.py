from django.urls import path

from shop import views

urlpatterns = [
    path("", views.questions, name="questions"),
    path("ask", views.ask, name="ask"),
    path("questions/<int:pk>", views.question, name="question"),
]
