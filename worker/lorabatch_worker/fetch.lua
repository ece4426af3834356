-- Give out up to ARGV[2] messages, ARGV[3] bytes of them (one at least), each noted as unacknowledged
-- in the same step: a worker that dies at any moment loses none.
--
-- KEYS: the hash and the index of unacknowledged messages; ARGV[5] lists, highest priority first, each
-- priority's lists (ARGV[4] of them) together; and as many lists for what is no kombu message.
-- ARGV[1] is the time in seconds.
-- Returns {list, tag, message, list, tag, message, ...}; the tag of what is no message is empty.
--
-- RPOP is the first write: after it, none of the others can be refused for want of memory.

local unacked, index = KEYS[1], KEYS[2]
local most, bytes = tonumber(ARGV[2]), tonumber(ARGV[3])
local lists, total = tonumber(ARGV[4]), tonumber(ARGV[5])
local out = {}

local function decoded(message)
  local fine, value = pcall(cjson.decode, message)
  if not fine then -- cjson wants pairs of surrogates, Python and its clients do not
    local blank = string.gsub(message, '\\u[dD][89a-fA-F]%x%x', '\\u0020')
    fine, value = pcall(cjson.decode, blank)
  end
  return fine and value
end

local function field(of, name)
  return type(of) == 'table' and of[name]
end

-- The message's tag, and what kombu notes to give it out again.
local function note_of(message)
  local properties = field(decoded(message), 'properties')
  local tag, route = field(properties, 'delivery_tag'), field(properties, 'delivery_info')
  local exchange, key = field(route, 'exchange'), field(route, 'routing_key')
  if type(exchange) ~= 'string' then
    exchange = ''
  end
  if type(tag) == 'string' and string.match(tag, '^[!-~]+$') and type(key) == 'string' and key ~= '' then
    return tag, '[' .. message .. ',' .. cjson.encode(exchange) .. ',' .. cjson.encode(key) .. ']'
  end
end

local function take(i)
  local list = KEYS[2 + i]
  local message = redis.call('LINDEX', list, -1)
  if not message then
    return false
  end
  local tag, note = note_of(message)
  redis.call('RPOP', list)
  if tag then
    redis.call('ZADD', index, ARGV[1], tag)
    redis.call('HSET', unacked, tag, note)
  else
    redis.call('LPUSH', KEYS[2 + total + i], message)
  end
  out[#out + 1] = list
  out[#out + 1] = tag or ''
  out[#out + 1] = message
  bytes = bytes - #message
  return true
end

for first = 1, total, lists do
  local more = true
  while more do
    more = false
    for i = first, first + lists - 1 do
      if #out >= 3 * most or bytes <= 0 then
        return out
      end
      more = take(i) or more
    end
  end
end
return out
