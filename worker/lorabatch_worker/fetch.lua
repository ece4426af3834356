-- Give out up to ARGV[2] messages, ARGV[3] bytes of them (one at least), each noted as unacknowledged
-- in the same step: a worker that dies at any moment loses none.
--
-- KEYS: the hash and the index of unacknowledged messages, then the lists, highest priority first,
-- each priority's lists together. ARGV: time in seconds, messages, bytes, lists a priority.
-- Returns {list, tag, message, list, tag, message, ...}. What is no kombu message goes to
-- LIST:unreadable and comes with an empty tag.

local unacked, index = KEYS[1], KEYS[2]
local most, bytes, lists = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local out = {}

local function tag_of(message)
  local fine, decoded = pcall(cjson.decode, message)
  local properties = fine and type(decoded) == 'table' and decoded['properties']
  local route = type(properties) == 'table' and properties['delivery_info']
  local tag = type(route) == 'table' and properties['delivery_tag']
  if type(tag) == 'string' and string.match(tag, '^[!-~]+$') then
    return tag, route
  end
end

local function take(list)
  local message = redis.call('RPOP', list)
  if not message then
    return false
  end
  local tag, route = tag_of(message)
  out[#out + 1] = list
  out[#out + 1] = tag or ''
  out[#out + 1] = message
  bytes = bytes - #message
  if not tag then
    redis.call('LPUSH', list .. ':unreadable', message)
    return true
  end
  redis.call('ZADD', index, ARGV[1], tag)
  local note = '[' .. message .. ',' .. cjson.encode(route['exchange'] or '')
  redis.call('HSET', unacked, tag, note .. ',' .. cjson.encode(route['routing_key'] or '') .. ']')
  return true
end

for first = 3, #KEYS, lists do
  local more = true
  while more do
    more = false
    for list = first, first + lists - 1 do
      if #out >= 3 * most or bytes <= 0 then
        return out
      end
      more = take(KEYS[list]) or more
    end
  end
end
return out
