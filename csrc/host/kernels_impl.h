// Bodies of the row kernels, written with compiler vectors of eight floats so that one text serves every
// instruction set. Include it once per variant, inside that variant's anonymous namespace.
//
// No include guard on purpose, and no includes: the including file brings <cstring>, <limits> and "kernels.h".

typedef float Floats __attribute__((vector_size(32)));
typedef std::int32_t Ints __attribute__((vector_size(32)));
typedef std::uint16_t Halves __attribute__((vector_size(16)));
typedef std::uint8_t Bytes8 __attribute__((vector_size(8)));

constexpr std::size_t kLanes = 8;
// The smallest amax told from zero, as in moe_ep_plugin/wire.py.
constexpr float kMinAmax = 7.888609052210118e-31f;  // 2^-100
constexpr float kFp8Max = 448.0f;

template <class V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store(void* to, const V& value) {
  std::memcpy(to, &value, sizeof(V));
}

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Ints widen(const Halves& halves) { return __builtin_convertvector(halves, Ints); }
inline Halves narrow(const Ints& ints) { return __builtin_convertvector(ints, Halves); }
inline Ints splat(std::int32_t value) { return Ints{} + value; }

// One type per element: `load8` and `store8` convert eight at a time.
struct Float32 {
  using Storage = float;
  static Floats load8(const float* from) { return load<Floats>(from); }
  static void store8(float* to, const Floats& value) { store(to, value); }
};

struct BFloat16 {
  using Storage = std::uint16_t;
  static Floats load8(const std::uint16_t* from) { return bits_as<Floats>(Ints(widen(load<Halves>(from)) << 16)); }
  static void store8(std::uint16_t* to, const Floats& value) {
    const Ints bits = bits_as<Ints>(value);
    const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Ints is_nan = (bits & 0x7fffffff) > 0x7f800000;
    store(to, narrow(((is_nan ? splat(0x7fc00000) : rounded) >> 16) & 0xffff));
  }
};

struct Float16 {
  using Storage = std::uint16_t;
#if defined(__F16C__)
  static Floats load8(const std::uint16_t* from) {
    return bits_as<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store8(std::uint16_t* to, const Floats& value) {
    const __m128i halves = _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
#else
  static Floats load8(const std::uint16_t* from) {
    const Ints half = widen(load<Halves>(from));
    const Ints sign = (half & 0x8000) << 16;
    const Ints magnitude = half & 0x7fff;
    // Shift exponent and mantissa into place and rebias by a multiplication, which also normalises denormals.
    const Floats scaled = bits_as<Floats>(Ints(magnitude << 13)) * 0x1p112f;
    const Ints special = magnitude >= 0x7c00;
    const Ints bits = special ? ((magnitude << 13) | 0x7f800000) : bits_as<Ints>(scaled);
    return bits_as<Floats>(Ints(bits | sign));
  }
  static void store8(std::uint16_t* to, const Floats& value) {
    const Ints all = bits_as<Ints>(value);
    const Ints sign = (all >> 16) & 0x8000;
    const Ints bits = all & 0x7fffffff;
    // Below 2^-14 an addition of 2^-1 aligns the mantissa to half's denormal step and rounds it.
    const Floats magnitude = bits_as<Floats>(bits);
    const Ints denormal = bits_as<Ints>(Floats(magnitude + 0.5f)) - 0x3f000000;
    const Ints normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    Ints half = bits < 0x38800000 ? denormal : normal;
    half = half > 0x7c00 ? splat(0x7c00) : half;
    half = bits >= 0x47800000 ? splat(0x7c00) : half;
    half = bits > 0x7f800000 ? splat(0x7e00) : half;
    store(to, narrow(half | sign));
  }
#endif
};

// Loads fewer than eight elements, zeros behind them.
template <class T>
inline Floats load_some(const typename T::Storage* from, std::size_t count) {
  typename T::Storage padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(typename T::Storage));
  return T::load8(padded);
}

template <class T>
inline void store_some(typename T::Storage* to, const Floats& value, std::size_t count) {
  typename T::Storage padded[kLanes];
  T::store8(padded, value);
  std::memcpy(to, padded, count * sizeof(typename T::Storage));
}

// Rows of one element, their sum of another.
template <class From, class To>
void reduce_rows(const ReduceTerm* terms, std::size_t num_terms, void* out, std::size_t hidden) {
  using Storage = typename From::Storage;
  auto* to = static_cast<typename To::Storage*>(out);
  std::size_t column = 0;
  for (; column + 2 * kLanes <= hidden; column += 2 * kLanes) {
    Floats total0{}, total1{}, partial0{}, partial1{};
    for (std::size_t i = 0; i < num_terms; ++i) {
      const Storage* row = static_cast<const Storage*>(terms[i].row) + column;
      const Floats product0 = From::load8(row) * terms[i].weight;
      const Floats product1 = From::load8(row + kLanes) * terms[i].weight;
      if (terms[i].starts_rank) {
        total0 += partial0;
        total1 += partial1;
        partial0 = product0;
        partial1 = product1;
      } else {
        partial0 += product0;
        partial1 += product1;
      }
    }
    To::store8(to + column, total0 + partial0);
    To::store8(to + column + kLanes, total1 + partial1);
  }
  for (; column < hidden; column += kLanes) {
    const std::size_t count = hidden - column < kLanes ? hidden - column : kLanes;
    Floats total{}, partial{};
    for (std::size_t i = 0; i < num_terms; ++i) {
      const Storage* row = static_cast<const Storage*>(terms[i].row) + column;
      const Floats product = load_some<From>(row, count) * terms[i].weight;
      if (terms[i].starts_rank) {
        total += partial;
        partial = product;
      } else {
        partial += product;
      }
    }
    store_some<To>(to + column, total + partial, count);
  }
}

void reduce(Element element, const ReduceTerm* terms, std::size_t num_terms, void* out, std::size_t hidden) {
  switch (element) {
    case Element::kFloat32: return reduce_rows<Float32, Float32>(terms, num_terms, out, hidden);
    case Element::kBFloat16: return reduce_rows<BFloat16, BFloat16>(terms, num_terms, out, hidden);
    case Element::kFloat16: return reduce_rows<Float16, Float16>(terms, num_terms, out, hidden);
    case Element::kFloat8: break;
  }
  throw std::logic_error("reduce: no sum of fp8 rows");
}

void reduce_floats(Element element, const ReduceTerm* terms, std::size_t num_terms, void* out, std::size_t hidden) {
  switch (element) {
    case Element::kFloat32: return reduce_rows<Float32, Float32>(terms, num_terms, out, hidden);
    case Element::kBFloat16: return reduce_rows<Float32, BFloat16>(terms, num_terms, out, hidden);
    case Element::kFloat16: return reduce_rows<Float32, Float16>(terms, num_terms, out, hidden);
    case Element::kFloat8: break;
  }
  throw std::logic_error("reduce_floats: no sum is fp8");
}

// e4m3 bits of values whose magnitude is at most 448; NaN gives 0x7f.
inline Ints to_e4m3(const Floats& value) {
  const Ints all = bits_as<Ints>(value);
  const Ints sign = (all >> 24) & 0x80;
  const Ints bits = all & 0x7fffffff;
  // Below 2^-6 the sum with 2^14 leaves the value in steps of 2^-9, rounded by the addition itself.
  const Ints denormal = bits_as<Ints>(Floats(bits_as<Floats>(bits) + 0x1p14f)) - 0x46800000;
  const Ints normal = (bits - 0x3c000000 + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  Ints small = bits < 0x3c800000 ? denormal : normal;
  small = bits > 0x7f800000 ? splat(0x7f) : small;
  return small | sign;
}

template <class T>
void quantize_rows(const void* row, std::size_t hidden, bool power_of_two, std::uint8_t* quantized, float* scales) {
  const auto* from = static_cast<const typename T::Storage*>(row);
  for (std::size_t first = 0; first < hidden; first += kFp8Block) {
    const std::size_t count = hidden - first < kFp8Block ? hidden - first : kFp8Block;
    Floats values[kFp8Block / kLanes];
    Ints peak{};
    const std::size_t vectors = (count + kLanes - 1) / kLanes;
    for (std::size_t v = 0; v < vectors; ++v) {
      const std::size_t left = count - v * kLanes;
      const auto* at = from + first + v * kLanes;
      values[v] = left >= kLanes ? T::load8(at) : load_some<T>(at, left);
      // Magnitudes of finite floats compare like their bits.
      Ints magnitude = bits_as<Ints>(values[v]) & 0x7fffffff;
      magnitude = magnitude < 0x7f800000 ? magnitude : Ints{};
      peak = magnitude > peak ? magnitude : peak;
    }
    std::int32_t amax_bits = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) amax_bits = peak[lane] > amax_bits ? peak[lane] : amax_bits;
    float amax = bits_as<float>(amax_bits);
    amax = amax > kMinAmax ? amax : kMinAmax;
    float scale = amax / kFp8Max;
    if (power_of_two) {
      const std::int32_t bits = bits_as<std::int32_t>(scale);
      scale = bits_as<float>((bits + 0x7fffff) & 0x7f800000);
    }
    scales[first / kFp8Block] = scale;
    const float reciprocal = 1.0f / scale;
    for (std::size_t v = 0; v < vectors; ++v) {
      const Ints infinite = (bits_as<Ints>(values[v]) & 0x7fffffff) >= 0x7f800000;
      Floats scaled = values[v] * reciprocal;
      scaled = scaled > kFp8Max ? Floats{} + kFp8Max : scaled;
      scaled = scaled < -kFp8Max ? Floats{} - kFp8Max : scaled;
      const Ints bits = infinite ? splat(0x7fffffff) : bits_as<Ints>(scaled);
      const Bytes8 bytes = __builtin_convertvector(to_e4m3(bits_as<Floats>(bits)), Bytes8);
      const std::size_t left = count - v * kLanes;
      std::memcpy(quantized + first + v * kLanes, &bytes, left < kLanes ? left : kLanes);
    }
  }
}

void quantize(Element element, const void* row, std::size_t hidden, bool power_of_two, std::uint8_t* quantized,
              float* scales) {
  switch (element) {
    case Element::kFloat32: return quantize_rows<Float32>(row, hidden, power_of_two, quantized, scales);
    case Element::kBFloat16: return quantize_rows<BFloat16>(row, hidden, power_of_two, quantized, scales);
    case Element::kFloat16: return quantize_rows<Float16>(row, hidden, power_of_two, quantized, scales);
    case Element::kFloat8: break;
  }
  throw std::logic_error("quantize: the rows are fp8 already");
}

inline Floats from_e4m3(const Bytes8& bytes) {
  const Ints all = __builtin_convertvector(bytes, Ints);
  const Ints sign = (all & 0x80) << 24;
  const Ints magnitude = all & 0x7f;
  const Ints normal = (magnitude << 20) + 0x3c000000;
  const Ints denormal = bits_as<Ints>(Floats(__builtin_convertvector(magnitude, Floats) * 0x1p-9f));
  Ints bits = magnitude < 8 ? denormal : normal;
  bits = magnitude == 0x7f ? splat(0x7fc00000) : bits;
  return bits_as<Floats>(Ints(bits | sign));
}

void dequantize(const std::uint8_t* quantized, const float* scales, std::size_t hidden, float* row) {
  std::size_t column = 0;
  for (; column + kLanes <= hidden; column += kLanes) {
    store(row + column, from_e4m3(load<Bytes8>(quantized + column)) * scales[column / kFp8Block]);
  }
  if (column == hidden) return;
  Bytes8 bytes{};
  std::memcpy(&bytes, quantized + column, hidden - column);
  store_some<Float32>(row + column, from_e4m3(bytes) * scales[column / kFp8Block], hidden - column);
}
