// Golden tables of the dynamic loss scale: configurations, and the state after each of a pattern of steps.
#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

#include "partita/loss_scale.h"

namespace partita {

inline LossScaler::Config dynamic(std::int32_t window = 1000, std::int32_t hysteresis = 2, bool consecutive = false) {
    LossScaler::Config config;
    config.dynamic = true;
    config.initial_scale = 65536.0;
    config.window = window;
    config.hysteresis = hysteresis;
    config.consecutive_hysteresis = consecutive;
    return config;
}

// After one step; 'x' is an overflow, '.' a good step.
struct Row {
    char step;
    double scale;
    std::int32_t hysteresis;
    std::int32_t good_steps;
    std::int32_t at_minimum = 0;
};

struct Golden {
    const char* name;
    LossScaler::Config config;
    std::vector<Row> rows;
};

inline void PrintTo(const Golden& golden, std::ostream* out) { *out << golden.name; }

inline LossScaler::Config range(double initial, double minimum, double maximum, double factor = 2.0,
                                std::int32_t window = 1000) {
    LossScaler::Config config = dynamic(window, 1);
    config.initial_scale = initial;
    config.minimum = minimum;
    config.maximum = maximum;
    config.factor = factor;
    return config;
}

// What DeepSpeed 0.19.8's DynamicLossScaler does with the same steps, but for "Maximum" and "FactorFour", which it has
// not.
inline const std::vector<Golden> tables = {
    {"Hysteresis",
     dynamic(3),
     {{'x', 65536, 1, 0},
      {'x', 32768, 1, 0},  // used up: from now on each overflow lowers the scale ...
      {'x', 16384, 1, 0},
      {'.', 16384, 1, 1},
      {'.', 16384, 1, 2},
      {'.', 16384, 1, 3},
      {'.', 32768, 2, 1},  // ... until a good step after a full window restores it
      {'x', 32768, 1, 0},
      {'.', 32768, 1, 1},  // one good step does not
      {'x', 16384, 1, 0},
      {'.', 16384, 1, 1},
      {'.', 16384, 1, 2},
      {'x', 8192, 1, 0},
      {'.', 8192, 1, 1},
      {'.', 8192, 1, 2},
      {'.', 8192, 1, 3},
      {'x', 4096, 1, 0}}},
    {"ConsecutiveHysteresis",
     dynamic(3, 2, true),
     {{'x', 65536, 1, 0},
      {'.', 65536, 2, 1},
      {'x', 65536, 1, 0},
      {'x', 32768, 1, 0},
      {'x', 16384, 1, 0},
      {'.', 16384, 2, 1},
      {'.', 16384, 2, 2},
      {'.', 16384, 2, 3},
      {'.', 32768, 2, 1}}},
    {"HysteresisOne",
     dynamic(2, 1),
     {{'x', 32768, 1, 0},
      {'x', 16384, 1, 0},
      {'.', 16384, 1, 1},
      {'.', 16384, 1, 2},
      {'.', 32768, 1, 1},
      {'.', 32768, 1, 2},
      {'.', 65536, 1, 1}}},
    {"HysteresisThree",
     dynamic(2, 3),
     {{'x', 65536, 2, 0},
      {'x', 65536, 1, 0},
      {'x', 32768, 1, 0},
      {'.', 32768, 1, 1},
      {'.', 32768, 1, 2},
      {'.', 65536, 3, 1},
      {'x', 65536, 2, 0}}},
    {"WindowOne",
     dynamic(1),
     {{'.', 65536, 2, 1}, {'.', 131072, 2, 1}, {'x', 131072, 1, 0}, {'.', 131072, 1, 1}, {'.', 262144, 2, 1}}},
    {"OverflowRestartsTheWindow",
     dynamic(3),
     {{'.', 65536, 2, 1},
      {'.', 65536, 2, 2},
      {'x', 65536, 1, 0},
      {'.', 65536, 1, 1},
      {'.', 65536, 1, 2},
      {'.', 65536, 1, 3}}},
    {"Minimum",
     range(4, 1, 8),
     {{'x', 2, 1, 0}, {'x', 1, 1, 0}, {'x', 1, 1, 0, 1}, {'x', 1, 1, 0, 1}, {'.', 1, 1, 1}, {'x', 1, 1, 0, 1}}},
    {"MinimumBetweenTwoScales", range(3, 2, 8), {{'x', 2, 1, 0}, {'x', 2, 1, 0, 1}}},
    {"Maximum",
     range(4, 1, 10, 2.0, 1),
     {{'.', 4, 1, 1}, {'.', 8, 1, 1}, {'.', 10, 1, 1}, {'.', 10, 1, 1}, {'x', 5, 1, 0}}},
    {"FactorFour",
     range(16, 1, 64, 4.0, 2),
     {{'x', 4, 1, 0}, {'.', 4, 1, 1}, {'.', 4, 1, 2}, {'.', 16, 1, 1}, {'.', 16, 1, 2}}},
};

}  // namespace partita
