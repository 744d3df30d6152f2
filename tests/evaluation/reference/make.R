# Makes the reference numbers of R in this folder: Rscript make.R
suppressPackageStartupMessages({library(pROC); library(survival); library(psych); library(riskRegression); library(pec)})
set.seed(20250101)
expected <- data.frame(name = character(), value = numeric(), source = character())
say <- function(name, value, source) {
  expected <<- rbind(expected, data.frame(name = name, value = as.numeric(value), source = source))
}
version <- function(package) paste(package, packageVersion(package))

# Two scores of the same patients, with ties.
n <- 120
target <- rbinom(n, 1, 0.3)
score_a <- round(plogis(rnorm(n) + 1.5 * target - 1), 2)
score_b <- round(plogis(0.6 * qlogis(pmin(pmax(score_a, 0.01), 0.99)) + rnorm(n)), 2)
binary <- data.frame(target, score_a, score_b)
write.csv(binary, "binary.csv", row.names = FALSE)
roc_a <- roc(target, score_a, quiet = TRUE, direction = "<")
roc_b <- roc(target, score_b, quiet = TRUE, direction = "<")
say("auroc_a", auc(roc_a), version("pROC"))
say("auroc_b", auc(roc_b), version("pROC"))
say("auroc_a_variance", var(roc_a, method = "delong"), version("pROC"))
say("auroc_covariance", cov(roc_a, roc_b, method = "delong"), version("pROC"))
test <- roc.test(roc_a, roc_b, method = "delong", paired = TRUE)
say("auroc_difference_p", test$p.value, version("pROC"))
say("auroc_difference_low", test$conf.int[1], version("pROC"))
say("auroc_difference_high", test$conf.int[2], version("pROC"))

# Newcombe's method 5, by its formula.
newcombe <- function(auroc, m, n) {
  half <- function(x) {
    s <- (m + n) / 2 - 1
    qnorm(0.975) * sqrt(x * (1 - x) * (1 + s * (1 - x) / (2 - x) + s * x / (1 + x)) / (m * n))
  }
  solve <- function(f, from, to) uniroot(f, c(from, to), tol = 1e-12)$root
  c(if (auroc == 0) 0 else solve(function(x) auroc - x - half(x), 0, min(auroc, 1 - 1e-9)),
    if (auroc == 1) 1 else solve(function(x) x - auroc - half(x), max(auroc, 1e-9), 1))
}
for (case in list(c(0.5, 10, 10), c(0.8, 4, 36), c(0.95, 15, 5), c(1, 2, 18), c(0.999, 100, 100), c(0, 8, 8))) {
  ends <- newcombe(case[1], case[2], case[3])
  label <- sprintf("newcombe_%g_%g_%g", case[1], case[2], case[3])
  say(paste0(label, "_low"), ends[1], "Newcombe 2006, method 5, with uniroot")
  say(paste0(label, "_high"), ends[2], "Newcombe 2006, method 5, with uniroot")
}

# Proportions: the exact interval with mid-P, from binomial probabilities.
mid_p <- function(k, n) {
  at_least <- function(p) pbinom(k, n, p, lower.tail = FALSE) + dbinom(k, n, p) / 2
  solve <- function(to) uniroot(function(p) at_least(p) - to, c(0, 1), tol = 1e-13)$root
  c(if (k == 0) 0 else solve(0.025), if (k == n) 1 else solve(0.975))
}
for (case in list(c(0, 5), c(5, 5), c(2, 20), c(37, 50), c(199, 200))) {
  ends <- mid_p(case[1], case[2])
  say(sprintf("mid-p_%g_%g_low", case[1], case[2]), ends[1], paste("R", getRversion()))
  say(sprintf("mid-p_%g_%g_high", case[1], case[2]), ends[2], paste("R", getRversion()))
}

# Gaffke's interval of the mean of losses below a bound, with an additional number that counts half.
seed <- .Random.seed
for (losses in list(c(rep(0.01, 18), 0.2, 0.6), seq(0, 1, length.out = 50))) {
  n <- length(losses)
  drawn <- cbind(matrix(rexp(n * 1e5), 1e5), rgamma(1e5, 0.5))
  drawn <- drawn / rowSums(drawn)
  means <- drawn[, 1:n] %*% losses
  say(sprintf("gaffke_%g_low", n), quantile(means, 0.025), paste("R", getRversion()))
  say(sprintf("gaffke_%g_high", n), quantile(means + drawn[, n + 1], 0.975), paste("R", getRversion()))
}
.Random.seed <- seed

# Agreement on four ordered classes.
latent <- rnorm(150)
grade <- function(x) findInterval(x, c(-0.8, 0, 0.8))
ordinal <- data.frame(target = grade(latent), prediction = grade(latent + rnorm(150)))
write.csv(ordinal, "ordinal.csv", row.names = FALSE)
say("quadratic_kappa", cohen.kappa(ordinal)$weighted.kappa, version("psych"))
say("spearman", cor(ordinal$target, ordinal$prediction, method = "spearman"), paste("R", getRversion()))

# Survival, with ties of events and censorings, and yearly times.
n <- 160
risk <- round(rnorm(n), 1)
life <- ceiling(rexp(n, 0.12 * exp(0.8 * risk)))
loss <- ceiling(rexp(n, 0.08))
time <- pmin(life, loss, 15)
event <- as.integer(life <= loss & life <= 15)
group <- findInterval(risk, c(-0.5, 0.5))
times <- c(2, 4, 8)
predicted <- exp(-outer(exp(risk), 0.12 * times))
colnames(predicted) <- paste0("survival_", times)
write.csv(data.frame(time, event, risk, group, predicted), "survival.csv", row.names = FALSE)
data <- data.frame(time, event, risk, group)
say("c_index", concordance(Surv(time, event) ~ risk, data, reverse = TRUE)$concordance, version("survival"))
say("c_index_uno", concordance(Surv(time, event) ~ risk, data, reverse = TRUE, timewt = "n/G2")$concordance, version("survival"))
say("log_rank_2", survdiff(Surv(time, event) ~ (risk > 0), data)$pvalue, version("survival"))
say("log_rank_3", survdiff(Surv(time, event) ~ group, data)$pvalue, version("survival"))
curve <- summary(survfit(Surv(time, event) ~ 1, data, conf.type = "log-log"), times = c(1, 3, 7, 12))
for (i in seq_along(curve$time)) {
  say(sprintf("km_%g", curve$time[i]), curve$surv[i], version("survival"))
  say(sprintf("km_%g_low", curve$time[i]), curve$lower[i], version("survival"))
  say(sprintf("km_%g_high", curve$time[i]), curve$upper[i], version("survival"))
}
scored <- Score(list(model = 1 - predicted), Surv(time, event) ~ 1, data = data, times = times,
                metrics = c("brier", "auc"), cens.model = "km", se.fit = FALSE)
for (i in seq_along(times)) {
  brier <- scored$Brier$score
  auc <- scored$AUC$score
  say(sprintf("brier_%g", times[i]), brier$Brier[brier$model == "model" & brier$times == times[i]], version("riskRegression"))
  say(sprintf("brier_km_%g", times[i]), brier$Brier[brier$model == "Null model" & brier$times == times[i]], version("riskRegression"))
  say(sprintf("time_auc_%g", times[i]), auc$AUC[auc$model == "model" & auc$times == times[i]], version("riskRegression"))
}
# The integral from 0 to 8, with a constant hazard between the times predicted, over the grid of ours.
grid <- seq(0, 8, length.out = 101)
hazard <- t(apply(-log(predicted), 1, function(h) approx(c(0, times), c(0, h), grid)$y))
curves <- pec(list(model = exp(-hazard)), Surv(time, event) ~ 1, data = data, times = grid, exact = FALSE,
              cens.model = "marginal", verbose = FALSE)
trapezoid <- function(y) sum(diff(grid) * (head(y, -1) + tail(y, -1)) / 2) / 8
say("integrated_brier", trapezoid(curves$AppErr$model), version("pec"))
say("integrated_brier_km", trapezoid(curves$AppErr$Reference), version("pec"))

# Cox: log partial likelihoods at a coefficient of 1, and the baseline hazard.
for (ties in c("breslow", "efron")) {
  fixed <- coxph(Surv(time, event) ~ risk, data, ties = ties, init = 1, control = coxph.control(iter.max = 0))
  say(paste0("partial_likelihood_", ties), fixed$loglik[1], version("survival"))
  base <- basehaz(fixed, centered = FALSE)
  for (t in times) say(sprintf("baseline_%s_%g", ties, t), base$hazard[max(which(base$time <= t))], version("survival"))
}
expected$value <- formatC(expected$value, digits = 15, format = "g", width = 1)
write.csv(expected, "expected.csv", row.names = FALSE, quote = c(1, 3))
